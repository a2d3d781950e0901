"""States and results of jobs: what writes them to the job store, and what waits for them there. Imported only where a job class has `keep`."""
