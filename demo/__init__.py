"""The embedded model: its pictures, its checker, its training and its weights."""
