"""What files of each format hold, by a walk through their structure: linear in the bytes, and nothing is unpacked."""
