from data.run import main

main()
