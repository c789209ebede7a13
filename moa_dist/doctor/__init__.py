"""What is wrong with a machine, an installation or the ranks of a job, and how to mend it."""
