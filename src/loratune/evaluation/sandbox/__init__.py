"""Sandbox"""
from loratune.evaluation.sandbox.choosing import available_isolations, choose_isolation
