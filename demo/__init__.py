"""The demonstration: two hosts on this machine, a bucket, and the story of losing one. The product never imports it."""
