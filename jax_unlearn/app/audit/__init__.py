"""An audit of any checkpoint: whether a concept is forgotten, or only hidden."""
