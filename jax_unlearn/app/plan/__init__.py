"""What a command costs, known before it is run: its step compiled from shapes alone."""
