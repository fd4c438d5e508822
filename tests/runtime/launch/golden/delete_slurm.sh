# cancel it
scancel NUMBER
