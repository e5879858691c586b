"""The results of a detector: metrics, saved detections, drawings."""
