"""One short script per thing a person does: `python -m launch.X --config=configs/Y.py --config.field=value`."""
