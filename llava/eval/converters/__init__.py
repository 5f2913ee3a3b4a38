"""Files that servers and graders take, made from answers."""
