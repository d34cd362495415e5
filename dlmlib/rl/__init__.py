"""Reinforcement learning: log-probability estimators and the losses built on them."""
