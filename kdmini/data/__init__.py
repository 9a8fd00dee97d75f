"""From photographs and annotations to batches on the training device."""
