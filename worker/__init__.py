"""A site: its Celery app, its tasks, the Trainer API and the training loop."""
