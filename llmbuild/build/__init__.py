"""The build path over stages that are handed in: a job, its plan, freshness, the search, the race, tuning."""
