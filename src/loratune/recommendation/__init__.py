"""From curves to an answer with its interval, or to a reason why there is none."""
