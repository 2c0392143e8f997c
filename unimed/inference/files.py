"""The files of a run's folder that a model is loaded with."""

RECIPE_FILE, RUN_FILE, MODEL_FOLDER = "recipe.yaml", "run.json", "model"
