"""The study's runner: data, trainings, merges, pictures, scores, truth, report, each done once."""
