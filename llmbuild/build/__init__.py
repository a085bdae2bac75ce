"""The build path over injected stages: a job, its plan, freshness, the search, the race, tuning."""
