"""Images, labels, class names, views of images and prompts for class names."""
