"""StableAvatar: a portrait and a voice become a talking video of any length."""

__version__ = "0.1.0"
