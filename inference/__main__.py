from inference.run import main

main()
