"""Tasks: where questions, images and expected answers come from."""
