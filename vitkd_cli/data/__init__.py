"""Named datasets and folders -> batches of uint8 images and labels, with randomness that is keyed."""
