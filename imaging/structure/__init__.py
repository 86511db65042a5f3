"""What files of each format hold, by a walk through their structure: linear in their bytes, without a decoder."""
