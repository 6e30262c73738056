"""Measures of videos: how well lips and voice agree, how good the picture looks."""
