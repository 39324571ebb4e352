"""What a trained model says and how well: evaluation, answers to prompts, predictions."""
