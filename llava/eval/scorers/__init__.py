"""Official scores as functions of answers."""
