"""Training: recipes, the task-ratio sampler, learning-rate schedules and the Trainer subclass."""
