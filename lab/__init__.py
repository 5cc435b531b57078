"""What the experiments share: texts, models, training, reports. It is not installed."""
