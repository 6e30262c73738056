"""Raw videos become a training set: inventory, cuts, crops, sound, masks, scores, lists (see docs/data_preparation.md)."""
