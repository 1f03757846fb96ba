"""The study: one YAML file, the whole truth of what is run. No torch, no files but its own."""
