"""Safetensors files and model folders, read and written as streams, all or nothing."""
