"""Trials, outcomes and scores in a database. The only SQL; knows nothing of torch."""
