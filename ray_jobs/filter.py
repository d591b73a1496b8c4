"""One verdict per sample of the corpus, as a Ray job; what must be done before it and is not, is done first:

ray job submit --working-dir . -- python ray_jobs/filter.py --config CONFIG cluster.address=auto
"""

from transfer import main

if __name__ == "__main__":
    main(until="filter")
