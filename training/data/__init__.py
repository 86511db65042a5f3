"""Sources of images: CIFAR-100 and image folders as uint8 tensors with labels, and their augmentation."""
