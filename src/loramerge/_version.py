"""The version of loramerge."""

__version__ = "0.1.0.dev0"
