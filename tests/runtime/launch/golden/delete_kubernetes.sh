# delete it; the claim keeps the run directory
kubectl delete jobset n --ignore-not-found
kubectl delete secret n-env --ignore-not-found
kubectl delete pod n-files --ignore-not-found --grace-period=1
