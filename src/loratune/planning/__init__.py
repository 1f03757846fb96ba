"""Study and facts in, ordered trials with every number explicit out. Pure: no torch, no GPU."""
