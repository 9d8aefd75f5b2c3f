from train import signals

signals.follow_launcher()

from train.run import main  # noqa: E402 - it takes seconds

main()
