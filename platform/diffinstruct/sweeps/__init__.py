"""One configuration made into many, each a trial under Ray Tune; studies over their rows."""
