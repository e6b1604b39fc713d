"""Recipes to transformers' and TRL's trainers."""
