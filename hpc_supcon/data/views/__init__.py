"""Random augmentation of whole batches on the device of their images."""
