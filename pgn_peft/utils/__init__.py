"""What several parts of the package need: checks of values and tensors, class labels, folders and Hub repositories."""
