"""One definition per metric: pure functions over timestamps, counts and bytes."""
