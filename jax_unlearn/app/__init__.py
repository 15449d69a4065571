"""The commands, and what they write."""
