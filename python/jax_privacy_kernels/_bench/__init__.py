"""What measures: the command ``bench``, and what it shares with the scripts under bench/."""
