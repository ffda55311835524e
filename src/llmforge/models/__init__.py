"""Loads any Hugging Face model and prepares it for training; never sees text."""
