"""Predicted lengths of answers: features of a prompt, the model of them, its file, its fit and its judge."""
