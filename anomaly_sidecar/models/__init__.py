"""Models behind the forecasts: pure functions over arrays, and what is fitted in a worker process."""
