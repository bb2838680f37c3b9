"""The study's runner: data, training, merges, pictures, scores, truth and report, each done once."""
