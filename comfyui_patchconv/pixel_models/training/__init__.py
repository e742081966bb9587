"""What the training of both pixel models shares: images from a folder, and the loop."""
