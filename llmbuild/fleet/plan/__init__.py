"""Plans: which operating points run where, how many, for a load; with a bound, a gap and a reason for each."""
